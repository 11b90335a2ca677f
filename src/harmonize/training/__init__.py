"""Training: the only part that knows lightning. ``run.py`` wires everything."""
