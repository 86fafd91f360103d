"""The public ops: each checks at the door, allocates, and hands one primitive to a backend."""
