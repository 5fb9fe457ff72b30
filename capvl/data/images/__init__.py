"""Images and clips: decoding, and what happens to them: geometry, crops, buckets.

Of the data it imports `randomness` alone.
"""
