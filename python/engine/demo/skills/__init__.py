"""One module a skill. Each has `turns(rng, held_out)`: one or more turns that belong together.

`held_out` selects the side of the split: combinations that training never shows.
"""
