"""From the datasets' official releases to the layouts that the readers read."""
