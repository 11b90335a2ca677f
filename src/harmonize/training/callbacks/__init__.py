"""What is watched and written while a run trains: one concern per file."""
