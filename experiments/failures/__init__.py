"""Where does staged sampling fail, why, what mends it, and what does it give for which speed?"""
