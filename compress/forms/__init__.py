"""How a target is stored: one file per form, each with the module that multiplies by it."""
