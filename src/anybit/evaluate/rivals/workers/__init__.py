"""Programs for other environments: a folder of their own, since a script's folder comes first when it imports."""
