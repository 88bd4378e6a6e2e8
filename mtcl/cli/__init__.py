"""The top floor: configs become objects, commands become runs. The only place that knows a config object."""
