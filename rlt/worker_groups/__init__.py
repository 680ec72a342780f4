"""Many processes behind one object that trains: a training service of this machine, or of a Ray cluster."""
