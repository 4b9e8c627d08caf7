"""What several tests share: oracles, strategies and checks. Import as ``from helpers.NAME import ...``."""
