"""The parts of faiss.contrib that are here: torch_utils and inspect_tools."""
