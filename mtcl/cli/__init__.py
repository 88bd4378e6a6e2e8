"""Command lines and their messages: one module per command."""
