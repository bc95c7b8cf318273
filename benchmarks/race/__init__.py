"""Time to target against torchopt and higher on three problems."""
