"""`mvd-scale report`: training runs and studies as one self-contained HTML page."""
