"""Real pictures with words from the fetched assets: drawings, stamps, figures and photographs.

A reader for each set says which pictures are worth showing and what they are called; `store.py`
keeps them made smaller in one file a set, `source.py` turns them into records.  Easy to get wrong:
nothing here holds a picture or a word of a set; their licences stay with the user's own cache.
"""
