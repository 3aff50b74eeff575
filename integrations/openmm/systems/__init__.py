"""Systems and topologies from input files, sequences and chemical structures."""
