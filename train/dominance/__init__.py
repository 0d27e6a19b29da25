"""Which of depth, width and data to double next: measured by training smaller systems, or looked at by masking."""
