"""The only door to raw data: which samples are there, and what do their rows say?"""
