"""Training and scoring: everything between built objects and files on disk."""
