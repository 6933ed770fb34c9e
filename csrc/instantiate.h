// Instantiates a function template for both types of numbers.
#pragma once

#define CSDIV_INSTANTIATE(function)                   \
  template decltype(function<float>) function<float>; \
  template decltype(function<double>) function<double>
