"""From files to cell sets: the store, its making, the plan of sets, and the loader."""
