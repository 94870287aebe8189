"""prunus"""
