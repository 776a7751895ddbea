"""The operators: schema, fakes, checks, choice of backend, autograd and the public function of each, one file each."""
