"""How a target is stored: one file per form, with the module that multiplies by it."""
