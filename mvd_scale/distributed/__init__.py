"""The processes of a job and the share of the machine that each of them has."""
