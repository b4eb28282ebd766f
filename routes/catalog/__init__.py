"""Operations that discover movies in the catalog."""
