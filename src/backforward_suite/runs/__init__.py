"""A run: its name, the files of its folder, and who works there."""
