"""Where a base's frozen weights live, and in what form: packed into few bits, as a library saved them or as we do."""
