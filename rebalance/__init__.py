"""Which samples, how many, in what order?"""
