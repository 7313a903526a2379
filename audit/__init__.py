"""Which samples does one modality carry alone?"""
