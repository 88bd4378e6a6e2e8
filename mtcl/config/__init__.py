"""From YAML to built objects: the rule and role of each config key, composition, builders; knows Hydra."""
