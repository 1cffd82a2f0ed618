"""What a number format costs a density of numbers, in closed form: the analytical half of the FP8-versus-INT8 study."""
