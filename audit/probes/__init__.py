"""Unimodal probes, cross-fitted and calibrated."""
