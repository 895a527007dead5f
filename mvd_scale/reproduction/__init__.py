"""`mvd-scale reproduce`: tables of the paper as data, run here in miniature or prepared for a cluster."""
