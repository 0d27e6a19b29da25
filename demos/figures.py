"""What figures of several demos share: colours and the look of axes."""

# Okabe and Ito: told apart with every common form of colour blindness.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def styled(ax, title: str, xlabel: str, ylabel: str, legend="best", size: int = 13) -> None:
  """Title, labels of `size` points with ticks one point smaller, no box; a legend at `legend`, none for None."""
  ax.set(xlabel=xlabel, ylabel=ylabel)
  ax.set_title(title, fontsize=13)
  ax.spines[["top", "right"]].set_visible(False)
  ax.tick_params(labelsize=size - 1)
  ax.xaxis.label.set_size(size)
  ax.yaxis.label.set_size(size)
  if legend is not None:
    ax.legend(frameon=False, fontsize=11, loc=legend)
