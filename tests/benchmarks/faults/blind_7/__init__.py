"""Cases by authors who had not seen a watch; held out: run once, when the watches are finished."""
