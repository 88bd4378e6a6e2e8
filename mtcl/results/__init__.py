"""Read finished run folders and show them as tables and pages."""
