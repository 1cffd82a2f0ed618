"""`anybit serve`: many requests on one model. `batch/` decides what runs next; the rest speaks HTTP."""
