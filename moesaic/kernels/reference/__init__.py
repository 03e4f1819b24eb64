"""The definition of truth: plain, slow versions of what the fast paths compute. Tests compare against these."""
