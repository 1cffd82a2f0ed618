"""Methods: one paper a file. Pure functions from a weight and what calibration knows of its input to terms."""
