"""The built-in recipes: one YAML file each, read by `anybit.recipe`."""
