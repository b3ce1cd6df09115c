"""`fastrl demo`: the whole pipeline on a model, data and a labeler made on the spot."""
