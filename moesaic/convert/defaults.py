"""What quantising takes where nothing else is said; apart, since the command line shows it without loading torch."""

# Tokens the report measures and the calibration sees: enough for three digits of the ratio, and for every one of 64
# experts to see a thousand.
REPORT_TOKENS = 65_536
CALIBRATION_TOKENS = 65_536
MAX_PERPLEXITY_RATIO = 1.05
MAX_KL = 0.1
