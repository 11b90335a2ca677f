"""Figures, files and the HTML report of what the diagnostics found."""
