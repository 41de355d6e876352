"""What the hosts of a run have in common, and what they must not differ in."""
