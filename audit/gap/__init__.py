"""The gap: is it bimodal, and which samples are balanced?"""
