"""How well `scan` tells unwanted rows from others, on the testbed and on real files; how fast it is."""
