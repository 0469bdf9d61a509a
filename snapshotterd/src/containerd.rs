//! Asking the host's containerd about images and content.
