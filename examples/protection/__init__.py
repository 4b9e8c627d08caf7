"""How much of a jammed fusion can be saved, and by what: the library's mechanisms beside the paper's scheme."""
