// The arguments of weight_mask, checked: what every implementation begins with.
#pragma once

#include <string>
#include <vector>

#include "check.h"

namespace fastprune {

enum class Importance { l1, l2, grad, taylor };

inline Importance parse_importance(const std::string& name) {
  if (name == "l1") return Importance::l1;
  if (name == "l2") return Importance::l2;
  if (name == "grad") return Importance::grad;
  if (name == "taylor") return Importance::taylor;
  fail("weight_mask: importance must be l1, l2, grad or taylor, got ", name);
}

inline void check_grads(const std::vector<Tensor>& weights, const std::vector<Tensor>& grads,
                        Importance importance, const std::string& name) {
  const size_t needed =
      importance == Importance::grad || importance == Importance::taylor ? weights.size() : 0;
  if (grads.size() != needed)
    fail("weight_mask: importance ", name, " takes ", needed, " gradients, got ", grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    if (grads[i].scalar_type() != weights[i].scalar_type() || !same_layout(grads[i], weights[i]))
      fail("weight_mask: grads[", i, "] must have the shape, dtype and strides of weights[", i, "]");
    check_same_device("weight_mask", "grads", grads[i], weights[i]);
  }
}

struct WeightMask {
  std::vector<Layer> layers;
  Importance importance;
};

inline WeightMask check_weight_mask(const std::vector<Tensor>& weights, double rate, const std::string& name,
                                    const std::vector<Tensor>& grads) {
  check_rate("weight_mask", rate);
  WeightMask call{check_weights("weight_mask", weights), parse_importance(name)};
  check_grads(weights, grads, call.importance, name);
  return call;
}

}  // namespace fastprune
