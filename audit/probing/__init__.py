"""A probe: how sure is one modality alone?"""
