"""Running a model: generation loop and streaming text."""
