"""Hold the code that travels with an export, so that transformers loads it where this project is not installed.

``model.imports.hub`` copies these files, and the modules of ``model`` that they import, into the export.
"""
