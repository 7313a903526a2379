"""The sampling axis: which samples, of which modality, in which order?"""
